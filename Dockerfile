# syntax=docker/dockerfile:1
# One image for every process: worker, projector and the command line. Built from the same hash-checked lock as .venv.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /venv
# The packages first: they change less often than the project, and the layer is kept.
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /venv/bin/pip install --disable-pip-version-check --require-hashes --no-deps --only-binary :all: -r requirements.lock
COPY . .
RUN /venv/bin/pip install --disable-pip-version-check --no-deps --no-build-isolation .

FROM python:3.11-slim
# /data belongs to the user here so that a new named volume mounted there does too.
RUN useradd --system --create-home --uid 10001 tollbook && install -d -m 700 -o tollbook /data
COPY --from=build /venv /venv
USER tollbook
WORKDIR /home/tollbook
VOLUME /data
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 TOLLBOOK_DATA_DIR=/data
ENTRYPOINT ["tollbook"]
CMD ["--help"]
