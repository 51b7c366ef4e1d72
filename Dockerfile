# One image for every process: worker, projector and the command line. Its packages come from uv.lock, as those of .venv.
FROM python:3.11-slim AS build
WORKDIR /src
# A user that may not write into /venv needs the bytecode there. What uv caches is of no use in a layer. A company that
# reads TLS traffic puts its certificate into the system of the base image.
ENV UV_PROJECT_ENVIRONMENT=/venv UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 UV_SYSTEM_CERTS=1
# The packages first: they change less often than the project, and the layer is kept.
COPY dev.py pyproject.toml uv.lock ./
RUN python dev.py setup uv
RUN .venv/bin/uv sync --frozen --no-dev --group build --all-extras --no-install-project
COPY . .
RUN .venv/bin/uv sync --frozen --no-dev --group build --all-extras --no-editable

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
