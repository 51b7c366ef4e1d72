"""`tollbook report` as a user meets it: the app and the file, in a real browser."""

import csv
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.chromium import CHROMIUM, FLAGS, describe_chromium, is_ci
from tests.report_data import HOSTILE, load, make_archive, make_data_dir, renamed
from tests.system import command_environment, tollbook

pytestmark = pytest.mark.slow

WAIT_MS = 20_000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory with a data directory at rest, as `tollbook demo --keep` leaves one, and an archive."""
    path, entries = tmp_path_factory.mktemp("home"), renamed(load(), {"user-0002": HOSTILE, "autumn": HOSTILE})
    make_data_dir(path / "tollbook-demo", entries)
    make_archive(path / "archive", entries)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        (pytest.fail if is_ci() else pytest.skip)(describe_chromium())
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


def run(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = command_environment(environment)
    return subprocess.run(
        [tollbook(), "report", *arguments], cwd=home, env=env, capture_output=True, text=True, check=False, timeout=90
    )


def ask(home: Path, sql: str) -> Any:
    with duckdb.connect(str(home / "tollbook-demo" / "tollbook.duckdb"), read_only=True) as connection:
        row = connection.execute(sql).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


def spent(home: Path, condition: str) -> Decimal:
    return ask(home, f"SELECT sum(spent_usd) FROM spend WHERE {condition}")  # noqa: S608 - the conditions below.


def exact(amount: Decimal) -> str:
    return f"exactly ${amount:,.9f}"


# --- In a browser


@pytest.fixture(scope="module")
def app(home: Path) -> Iterator[str]:
    with served(home) as url:
        yield url


@contextmanager
def served(home: Path, *options: str) -> Iterator[str]:
    """Yield the app's address; the command ends by Ctrl-C, with exit code 0 and without a word on standard error."""
    command = [tollbook(), "report", *options]
    with subprocess.Popen(
        command, cwd=home, env=command_environment({"BROWSER": "false"}), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(
                r"The spend report is at (http://127\.0\.0\.1:\d+(?:/[a-z]+)?/\?access_token=[\w-]{22})\n", line
            )
            assert found is not None, line
            yield found[1]
            process.send_signal(signal.SIGINT)
            code = process.wait(20)
            assert process.stderr is not None
            assert (code, process.stderr.read()) == (0, "")
        finally:
            process.kill()


def new_page(browser: Browser, foreign: list[str], **options: Any) -> Page:
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda error: foreign.append(f"error: {error}"))
    page.on("dialog", lambda dialog: foreign.append(f"a name was executed: {dialog.message}"))
    local = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "file:")
    page.on("request", lambda request: None if request.url.startswith(local) else foreign.append(request.url))
    return page


def test_the_app_shows_what_sql_says_and_a_filter_changes_it(browser: Browser, app: str, home: Path) -> None:
    foreign: list[str] = []
    page = new_page(browser, foreign, viewport={"width": 1280, "height": 900})
    with_token = page.request.get(app.partition("?")[0], max_redirects=0)
    assert with_token.status != 200  # Without the token there is nothing to see.
    # Not at the top: its import takes half a second, and every process of the suite imports every file.
    import marimo

    # But for marimo's own files, which browsers keep.
    assets = Path(marimo.__file__).parent / "_static" / "assets"
    asset = next(path for path in sorted(assets.iterdir()) if path.suffix == ".js")
    answer = page.request.get(f"{app.partition('/?')[0]}/assets/{asset.name}")
    assert (answer.status, answer.body()) == (200, asset.read_bytes())
    assert answer.headers["content-type"].startswith("text/javascript")
    assert "immutable" in answer.headers["cache-control"]
    page.goto(app)
    newest = ask(home, "SELECT max(period) FROM spend")
    value, denied = page.locator("#tile-spent .detail"), page.locator("#tile-denied .value")
    expect(value).to_have_text(exact(spent(home, f"period = '{newest}'")), timeout=WAIT_MS)
    refused = ask(home, f"SELECT sum(denied) FROM spend WHERE period = '{newest}'")  # noqa: S608 - a period.
    expect(denied).to_have_text(f"{refused:,}")
    events = ask(home, "SELECT count(*) FROM events")
    expect(page.locator(".freshness")).to_contain_text(re.compile(rf"tollbook-demo/ at rest.* number {events:,}\."))
    # Every chart is drawn.
    drawn = "#figure-{} :is(canvas, svg.marks)"
    for name in ("spend", "cap_use", "cap_classes", "models", "latency", "campaigns", "fallbacks", "denials"):
        page.locator(drawn.format(name)).first.wait_for()
    # The table says the same, to the nano-dollar, and can be searched.
    ranked = f"FROM spend WHERE period = '{newest}' ORDER BY spent_usd DESC, user_id OFFSET 20"
    user, money = ask(home, f"SELECT user_id, spent_usd {ranked}")
    page.get_by_placeholder("Search").first.fill(user)
    expect(page.get_by_role("row").filter(has_text=user).first).to_contain_text(f"{money:f}")
    # Every period, then one plan of it.
    page.get_by_label("Period").select_option(label="all")
    expect(value).to_have_text(exact(spent(home, "true")))
    page.get_by_label("Plan").select_option(label="starter")
    expect(value).to_have_text(exact(spent(home, "plan = 'starter'")))
    # A user without refusals: the empty state. The choice outlives a refresh.
    page.get_by_label("Plan").select_option(label="all")
    page.locator('marimo-dropdown[data-label*="User"] button').click()
    page.keyboard.type(user)
    page.get_by_role("option", name=user, exact=True).click()
    expect(value).to_have_text(exact(spent(home, f"user_id = '{user}'")))
    expect(page.locator("#figure-denials .empty")).to_have_text("No call was denied in this selection.")
    read_at = page.locator(".freshness").inner_text()
    page.locator("marimo-refresh").get_by_role("button").first.click()
    expect(page.locator(".freshness")).not_to_have_text(read_at)
    expect(value).to_have_text(exact(spent(home, f"user_id = '{user}'")))
    assert foreign == []
    page.close()


def test_behind_a_proxy_it_is_served_under_a_base_path(browser: Browser, home: Path) -> None:
    """The proxy has an address of its own and passes everything on unchanged, web sockets too."""
    with served(home, "--base-path", "/spend/", "--host", "0.0.0.0") as url, proxied(url) as outside:  # noqa: S104
        assert "/spend/?access_token=" in outside
        foreign: list[str] = []
        page = new_page(browser, foreign, viewport={"width": 1280, "height": 900})
        assert page.request.get(outside.replace("/spend/", "/"), max_redirects=0).status == 404
        paths: list[str] = []
        page.on("request", lambda request: paths.append(request.url))
        page.goto(outside)
        newest = ask(home, "SELECT max(period) FROM spend")
        expect(page.locator("#tile-spent .detail")).to_have_text(
            exact(spent(home, f"period = '{newest}'")), timeout=WAIT_MS
        )
        origin = outside.partition("/spend/")[0]
        assert [each for each in paths if each.startswith("http") and not each.startswith(f"{origin}/spend/")] == []
        assert foreign == []
        page.close()


@contextmanager
def proxied(url: str) -> Iterator[str]:
    """Yield the address at another port, from which every byte is passed on."""
    port = int(url.split(":")[2].partition("/")[0])

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                inside = listener.accept()[0]
                outside = socket.create_connection(("127.0.0.1", port))
                for pair in ((inside, outside), (outside, inside)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield url.replace(f":{port}/", f":{listener.getsockname()[1]}/")
        listener.shutdown(socket.SHUT_RDWR)


def test_the_file_stands_alone_and_its_tables_can_be_searched_sorted_and_exported(
    browser: Browser, home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    wrote = run(home, "--html", str(file), "--archive", "archive", "--period", "all")
    assert (wrote.returncode, wrote.stderr) == (0, "")
    assert wrote.stdout.startswith(f"{file}: all periods. Archive archive/ alone: sealed events only.")
    foreign: list[str] = []
    page = new_page(browser, foreign, viewport={"width": 800, "height": 900}, offline=True, accept_downloads=True)
    page.goto(file.as_uri())
    expect(page.locator("#tile-spent .detail")).to_have_text(exact(spent(home, "true")))
    assert page.locator("svg.marks").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
    sheet = page.locator("#users")
    sheet.locator("summary").click()
    sheet.get_by_role("searchbox").fill("user-0007")
    expect(sheet.locator(".found")).to_have_text(re.compile(r"^1 of \d+ rows$"))
    with page.expect_download() as download:
        sheet.get_by_role("button", name="Export CSV").click()
    rows = list(csv.DictReader(download.value.path().read_text(encoding="utf-8").splitlines()))
    assert HOSTILE in {row["user_id"] for row in rows}
    assert sum(Decimal(row["spent_usd"]) for row in rows) == spent(home, "true")
    made = """<table><tr><td>=1+1</td><td>@x</td><td class='number'>-2.5</td><td>a"b</td></tr></table>"""
    assert page.evaluate(f"csv(new DOMParser().parseFromString({made!r}, 'text/html').querySelector('table'))") == (
        '\'=1+1,\'@x,-2.5,"a""b"\n'
    )
    sheet.get_by_role("columnheader", name="denied").click()
    most = ask(home, "SELECT sum(denied) AS n FROM spend GROUP BY user_id ORDER BY n DESC")
    expect(sheet.locator("tbody tr:not([hidden])")).to_have_count(1)
    assert sheet.locator("tbody tr").first.locator("td").last.text_content() == str(most)
    assert foreign == []
    page.close()
