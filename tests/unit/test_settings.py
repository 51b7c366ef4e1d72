"""Settings: read once, refused if any value is wrong, and never showing secrets."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.quick import first_quick
from tollbook.inference.bounds import MAX_COMPLETION_TOKENS, bound
from tollbook.inference.errors import SettingsError
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.runtime import answer_timeout_s
from tollbook.inference.settings import Settings, load_settings, settings_table
from tollbook.inference.stated_policy import concurrency_of, policy_of
from tollbook.schemas.messages import Message
from tollbook.schemas.usage import Usage

SECRET = "sk-or-v1-0123456789abcdef"
NOVEMBER_2026_MS = 1_795_000_000_000
USD = 1_000_000_000


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:

    for name in list(os.environ):
        if name.startswith(("TOLLBOOK_", "OPENROUTER_")) or name == "REDIS_URL":
            monkeypatch.delenv(name)


def load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings(env_file=None)


def problems(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(monkeypatch, **variables)
    return caught.value.problems


def test_defaults_are_the_documented_ones() -> None:
    settings = load_settings(env_file=None)
    assert settings.redis_url is None
    assert settings.data_dir == Path("data")
    assert settings.openrouter_base_url == "https://openrouter.ai/api/v1"
    assert settings.provider_dialect == "openrouter"
    assert (settings.attempt_timeout_s, settings.claim_after_s, settings.hold_wait_s) == (60, 30, 600)
    assert (settings.namespace, settings.partitions, settings.retries) == ("tollbook", 1, 2)
    assert settings.result_ttl_s == 7 * 86_400
    assert settings.idempotency_ttl_s == 40 * 86_400
    assert {settings.concurrency.of(stream) for stream in ("scraping", "generation")} == {32}
    policy = policy_of(settings)
    assert sum(concurrency_of(settings, policy).values()) == 4 * 32
    assert policy.plan_caps_nanousd == {"trial": 5 * USD, "starter": 15 * USD, "growth": 40 * USD}
    assert settings.day_cap_nanousd is None
    assert (settings.dead_letters_max, settings.dead_letters_keep_s) == (10_000, 30 * 86_400)
    assert (settings.task_keep_s, settings.reply_stream_max, settings.confirm_usd) == (86_400, 100_000, 100)


def test_finished_tasks_are_kept_by_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, TOLLBOOK_TASK_KEEP_S="off").task_keep_s is None
    assert load(monkeypatch, TOLLBOOK_TASK_KEEP_S="7200").task_keep_s == 7_200


def test_environment_wins_over_the_file_and_both_over_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("TOLLBOOK_RETRIES=5\nTOLLBOOK_PARTITIONS=4\nREDIS_URL=redis://file\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("TOLLBOOK_RETRIES", "7")
    monkeypatch.setenv("TOLLBOOK_PORT", "")
    settings = load_settings(env_file=file)
    assert (settings.retries, settings.partitions, settings.redis_url, settings.port) == (7, 4, "redis://file", None)


def test_caller_wins_over_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOLLBOOK_DATA_DIR", "/elsewhere")
    assert load_settings(env_file=None, data_dir=tmp_path).data_dir == tmp_path


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("TOLLBOOK_CONCURENCY", "64", "TOLLBOOK_CONCURENCY: unknown setting; did you mean TOLLBOOK_CONCURRENCY?"),
        ("TOLLBOOK_CAPZ", "{}", "TOLLBOOK_CAPZ: unknown setting; did you mean TOLLBOOK_CAPS?"),
        ("TOLLBOOK_NONSENSE", "64", "TOLLBOOK_NONSENSE: unknown setting; the documentation lists all settings"),
        ("TOLLBOOK_RETRIES", "many", "TOLLBOOK_RETRIES: must be a whole number from 0 to 10, not 'many'"),
        ("TOLLBOOK_RETRIES", "-1", "TOLLBOOK_RETRIES: must be a whole number from 0 to 10, not '-1'"),
        (
            "TOLLBOOK_IDEMPOTENCY_TTL_S",
            "2678399",
            "TOLLBOOK_IDEMPOTENCY_TTL_S: must be a whole number of at least 2678400, not '2678399'",
        ),
        (
            "TOLLBOOK_RESULT_TTL_S",
            "9999999",
            "TOLLBOOK_RESULT_TTL_S: must be at most TOLLBOOK_IDEMPOTENCY_TTL_S (3456000), not 9999999",
        ),
        ("TOLLBOOK_ATTEMPT_TIMEOUT_S", "0", "must be a number greater than 0 and at most 3600, not '0'"),
        ("TOLLBOOK_ATTEMPT_TIMEOUT_S", "nan", "TOLLBOOK_ATTEMPT_TIMEOUT_S: must be a number"),
        ("TOLLBOOK_STREAM_KEEP_S", "inf", "TOLLBOOK_STREAM_KEEP_S: must be a number of at least 0, not 'inf'"),
        ("TOLLBOOK_APP_URL", "example.org", "TOLLBOOK_APP_URL: must be an http or https address, not 'example.org'"),
        ("TOLLBOOK_NAMESPACE", "{a}", "TOLLBOOK_NAMESPACE: must be 1 to 64 of the characters a-z"),
        ("TOLLBOOK_LOG_LEVEL", "debgu", "not 'DEBGU'; did you mean 'DEBUG'?"),
        ("TOLLBOOK_CONCURRENCY", "0", "TOLLBOOK_CONCURRENCY: must be a whole number of calls from 1 to 10000, not 0"),
        (
            "TOLLBOOK_CONCURRENCY",
            '{"generation": 3.5}',
            "'generation' must be a whole number of calls from 1 to 10000, not 3.5",
        ),
        ("TOLLBOOK_CONCURRENCY", "{", "TOLLBOOK_CONCURRENCY: is not JSON (character 2)"),
        ("TOLLBOOK_CONCURRENCY", "1" * 5000, "TOLLBOOK_CONCURRENCY: has a number of 5000 digits"),
        ("TOLLBOOK_CONCURRENCY", "[" * 100_000, "TOLLBOOK_CONCURRENCY: is nested too deeply"),
        ("TOLLBOOK_CAPS", '{"user": {}}', "unknown field 'user'; did you mean 'users'? Known: users, plans"),
        ("TOLLBOOK_CAPS", '{"plans": {"gold": 1}}', "unknown plan 'gold'; known: trial, starter, growth"),
        ("TOLLBOOK_CAPS", '{"plans": {"Trial": 1}}', "unknown plan 'Trial'; did you mean 'trial'?"),
        (
            "TOLLBOOK_CAPS",
            '{"plans": {"trial": "x"}}',
            "the cap of plan 'trial' must be dollars from 0 to 1000000, not 'x'",
        ),
        ("TOLLBOOK_CAPS", '{"users": {"u": NaN}}', "the cap of user 'u' must be dollars from 0 to 1000000, not nan"),
        ("TOLLBOOK_CAPS", '{"users": {"u": true}}', "the cap of user 'u' must be dollars from 0 to 1000000, not true"),
        ("TOLLBOOK_CAPS", '{"users": 5}', "TOLLBOOK_CAPS: 'users' must be a JSON object, not 5"),
        ("TOLLBOOK_CAPS", '{"users": {"a\\\\b": 1}}', "TOLLBOOK_CAPS: a user id must have no double quotes"),
        ("TOLLBOOK_CAPS", '{"users": {"u": -1}}', "the cap of user 'u' must be dollars from 0 to 1000000, not -1"),
        ("TOLLBOOK_CAPS", '{"users": {"u": 1, "u": 2}}', "TOLLBOOK_CAPS: has the key 'u' twice"),
        (
            "TOLLBOOK_CAPS",
            '{"users": {"e\u0301": 1, "\u00e9": 2}}',
            "TOLLBOOK_CAPS: names user '\u00e9' twice, in two spellings of Unicode",
        ),
        ("TOLLBOOK_PRICES", '{"m": {"prompt": 1, "prompt": 2}}', "TOLLBOOK_PRICES: has the key 'prompt' twice"),
        ("TOLLBOOK_ROUTES", '{"score_post": {}, "score_post": {}}', "TOLLBOOK_ROUTES: has the key 'score_post' twice"),
        ("TOLLBOOK_CAPS", "5", "TOLLBOOK_CAPS: must be a JSON object, not 5"),
        ("TOLLBOOK_DUCKDB_MEMORY", "1", "must be a size such as 512MB or 2GB, at least 64MB, not '1'"),
        ("TOLLBOOK_REPORT_MEMORY", "63MB", "must be a size such as 512MB or 2GB, at least 64MB, not '63MB'"),
        ("TOLLBOOK_DAY_CAP_USD", "NaN", "TOLLBOOK_DAY_CAP_USD: must be dollars from 0 to 1000000, not 'NaN'"),
        ("TOLLBOOK_DAY_CAP_USD", "five", "TOLLBOOK_DAY_CAP_USD: must be dollars from 0 to 1000000, not 'five'"),
        ("TOLLBOOK_PRICES", '{"m": {"prompt": 1}}', "TOLLBOOK_PRICES: 'completion' of 'm' is missing"),
        (
            "TOLLBOOK_PRICES",
            '{"m": {"prompt": 1, "completion": -1}}',
            "TOLLBOOK_PRICES: 'completion' of 'm' must be dollars from 0 to 10000, not -1",
        ),
        (
            "TOLLBOOK_PRICES",
            '{"m": {"prompt": 1, "completion": 1, "cache": 1}}',
            "unknown field 'cache'; did you mean 'cached'?",
        ),
        (
            "TOLLBOOK_PRICES",
            '{"m": {"prompt": 1, "completion": 1, "from": "soon"}}',
            "'from' of 'm' must be a day in UTC such as '2026-12-01', not 'soon'",
        ),
        ("TOLLBOOK_PRICES", '{"m": []}', "'m' must have one price or more, each with a different 'from' day"),
        (
            "TOLLBOOK_PRICES",
            '{"m": [{"prompt": 1, "completion": 1, "from": "2026-12-01"},'
            ' {"prompt": 2, "completion": 1, "from": "20261201"}]}',
            "'m' must have one price or more, each with a different 'from' day",
        ),
        (
            "TOLLBOOK_PRICES",
            '{"m": {"prompt": 1e-400, "completion": 1}}',
            "'prompt' of 'm' must have at most 100 decimal places",
        ),
        ("TOLLBOOK_CAPS", '{"users": {"u1": 1e-400}}', "'u1' must have at most 100 decimal places"),
        ("TOLLBOOK_PRICES", '{"a b": {"prompt": 1, "completion": 1}}', "'a b' must be a model id such as"),
        ("TOLLBOOK_ROUTES", '{"ping": {}}', "TOLLBOOK_ROUTES: 'ping' calls no model and has no route"),
        (
            "TOLLBOOK_ROUTES",
            '{"score_post": {"max_tokens": "lots"}}',
            "TOLLBOOK_ROUTES: 'score_post.max_tokens' must be a whole number",
        ),
        (
            "TOLLBOOK_ROUTES",
            '{"score_post": {"modle": "x"}}',
            "unknown field 'modle' in 'score_post'; did you mean 'model'?",
        ),
        (
            "TOLLBOOK_ROUTES",
            '{"scor_post": {}}',
            "unknown task type 'scor_post'; did you mean 'score_post'? Known: classify",
        ),
        (
            "TOLLBOOK_ROUTES",
            '{"score_post": {"model": "gemini-flash"}}',
            "'score_post': the fallback is the model itself",
        ),
        ("TOLLBOOK_METRICS_PORT", "70000", "must be a port from 1 to 65535, 0 for a free one, or 'off', not"),
        ("TOLLBOOK_METRICS_PORT", "none", "must be a port from 1 to 65535, 0 for a free one, or 'off', not"),
        ("TOLLBOOK_TASK_KEEP_S", "never", "must be a number of seconds from 0 to 316224000, or off, not 'never'"),
        ("TOLLBOOK_TASK_KEEP_S", "nan", "must be a number of seconds from 0 to 316224000, or off, not 'nan'"),
        ("TOLLBOOK_DEAD_LETTERS_MAX", "0", "TOLLBOOK_DEAD_LETTERS_MAX: must be"),
        ("TOLLBOOK_TRACES", "yes", "TOLLBOOK_TRACES: must be one of 'off', 'otlp', 'console', not 'yes'"),
        ("REDIS_URL", "http://x", "REDIS_URL: must begin with redis://"),
        ("OPENROUTER_BASE_URL", "openrouter.ai", "OPENROUTER_BASE_URL: must be an http or https address"),
        ("OPENROUTER_BASE_URL", "https://u:p@h/v1", "OPENROUTER_BASE_URL: must hold no user name and no password"),
        ("OPENROUTER_BASE_URL", "https://[h/v1", "OPENROUTER_BASE_URL: is not a valid address"),
        ("OPENROUTER_BASE_URL", "http://h:x/v1", "OPENROUTER_BASE_URL: must have a port from 1 to 65535, or none"),
        ("OPENROUTER_API_KEY", "two words", "OPENROUTER_API_KEY: must be 1 to 1000 printable ASCII"),
    ],
)
def test_wrong_value_is_one_clear_line(name: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = problems(monkeypatch, **{name: value})
    assert len(lines) == 1
    assert problem in lines[0]
    assert "\n" not in lines[0]


def test_a_misspelt_override_is_refused_as_a_variable_is() -> None:
    with pytest.raises(SettingsError, match="unknown setting 'retriez'; did you mean 'retries'\\? Known: redis_url"):
        load_settings(env_file=None, retriez=3)


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"TOLLBOOK_RETRIES=\xff\n")
    with pytest.raises(SettingsError, match=r"\.env cannot be read: it is not UTF-8"):
        load_settings(env_file=tmp_path / ".env")


FOREIGN = re.compile(
    r"Input should|Value error|Field required|should (be|have|match)|digits. for|Invalid|codec|invalid"
)
ODD_VALUES = [
    "x" * 5_000, "1" * 5_000, "[", '"', "{}", "[]", "null", "true", "NaN", "-1", "1e999", "1." + "0" * 500 + "1", " ",
    '{"a": 1}', '{"users": {"' + "u" * 500 + '": -1}}', '{"score_post": {"' + "u" * 500 + '": -1}}',
    '{"m": {"prompt": 1e999}}',
    '{"plans": [1]}', '{"m": [{"prompt": 1, "completion": 1, "from": 20261201}]}', "https://[", "redis://h:x",
    "\u0130",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", first_quick(15, [str(field.validation_alias) for field in Settings.model_fields.values()])
)
def test_any_value_is_accepted_or_refused_in_one_plain_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ODD_VALUES:
        lines: tuple[str, ...] = ()
        try:
            load(monkeypatch, **{name: value})
        except SettingsError as exc:
            lines = exc.problems
        assert len(lines) <= 1 or name == "TOLLBOOK_ROUTES", value
        for line in lines:
            assert line.startswith(f"{name}: ")
            assert not FOREIGN.search(line), line
            assert line.isprintable(), value
            assert len(line) < 400, value


def test_an_unknown_stream_is_reported_once_the_policy_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = load(monkeypatch, TOLLBOOK_CONCURRENCY='{"generations": 3}')
    with pytest.raises(SettingsError) as caught:
        concurrency_of(settings, policy_of(settings))
    assert caught.value.problems == (
        "TOLLBOOK_CONCURRENCY: unknown stream 'generations'; did you mean 'generation'? "
        "Known: scraping, analysis, generation, monitoring",
    )


def test_all_problems_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = problems(monkeypatch, TOLLBOOK_RETRIES="x", TOLLBOOK_TYPO="1", REDIS_URL="ftp://x")
    assert len(lines) == 3


def test_misspelt_name_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("TOLLBOOK_CAP={}\n")
    with pytest.raises(SettingsError, match="did you mean TOLLBOOK_CAPS"):
        load_settings(env_file=file)


@pytest.mark.parametrize(
    "variables",
    [
        {"OPENROUTER_API_KEY": SECRET + "\n"},
        {"OPENROUTER_API_KEY": SECRET, "TOLLBOOK_RETRIES": "x"},
        {"REDIS_URL": f"ftp://:{SECRET}@host"},
        {"OPENROUTER_BASE_URL": f"https://user:{SECRET}@host/v1"},
        {"OPENROUTER_BASE_URL": f"https://user:{SECRET}\u2100@host/v1"},
        {"OPENROUTER_BASE_URL": f"https://user:{SECRET}@[host/v1"},
        {"REDIS_URL": f"redis://:{SECRET}\u2100@host"},
        {"REDIS_URL": f"redis://:{SECRET}@[host"},
    ],
)
def test_no_message_shows_a_secret(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert SECRET not in "".join(problems(monkeypatch, **variables))


def test_no_repr_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, OPENROUTER_API_KEY=SECRET, REDIS_URL=f"redis://:{SECRET}@host")
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)


def test_money_in_json_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(
        monkeypatch,
        TOLLBOOK_CAPS='{"users": {"u42": 0.1}, "plans": {"trial": "7.25"}}',
        TOLLBOOK_DAY_CAP_USD="0.3",
        TOLLBOOK_CAMPAIGN_CAP_USD="100",
    )
    assert settings.caps.users == {"u42": USD // 10}
    policy = policy_of(settings)
    assert policy.plan_cap_nanousd("trial") == 7 * USD + USD // 4
    assert policy.plan_cap_nanousd("growth") == 40 * USD
    assert policy.user_cap_nanousd("u42", "growth") == USD // 10
    assert [(rule.name, rule.cap_nanousd("")) for rule in policy.budgets] == [
        ("day", 3 * USD // 10), ("campaign", 100 * USD),
    ]  # fmt: skip
    assert (settings.day_cap_nanousd, settings.campaign_cap_nanousd) == (3 * USD // 10, 100 * USD)


def test_configured_prices_reach_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(
        monkeypatch,
        TOLLBOOK_PRICES='{"own/model": [{"prompt": 0.1, "completion": "0.2"},'
        ' {"prompt": 1, "completion": 2, "cached": 0.5, "cache_write": 3, "request": 0.01, "from": "2026-12-01"}]}',
    )
    prices = PriceCatalogue.of_policy(policy_of(settings), provider=settings.price_provider)
    usage = Usage(prompt_tokens=10, completion_tokens=10, cached_tokens=4)
    assert prices.cost("own/model", usage, NOVEMBER_2026_MS) == 10 * 100 + 10 * 200
    december = 1_796_083_200_000
    assert prices.cost("own/model", usage, december - 1) == 10 * 100 + 10 * 200
    assert prices.cost("own/model", usage, december) == 6 * 1_000 + 4 * 500 + 10 * 2_000 + 10_000_000


def test_highest_price_that_can_be_set_can_still_be_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, TOLLBOOK_PRICES='{"m": {"prompt": 10000, "completion": 10000, "cache_write": 9000}}')
    price = PriceCatalogue.of_policy(policy_of(settings), provider=settings.price_provider).price("m", NOVEMBER_2026_MS)
    bound([Message(role="user", content="x" * 1_000_000)], MAX_COMPLETION_TOKENS, price)


def test_routes_are_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(
        monkeypatch, TOLLBOOK_ROUTES='{"score_post": {"model": "gpt-4o-mini", "fallback": null, "temperature": 0.5}}'
    )
    route = policy_of(settings).tasks["score_post"]
    assert (route.model, route.fallback, route.temperature) == ("openai/gpt-4o-mini", (), 0.5)


@pytest.mark.parametrize(
    ("value", "generation", "scraping"), [("7", 7, 7), ('{"generation": 64}', 64, 32), ('{"scraping": 1}', 32, 1)]
)
def test_concurrency_is_one_number_or_one_for_each_stream(
    value: str, generation: int, scraping: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(monkeypatch, TOLLBOOK_CONCURRENCY=value)
    assert (settings.concurrency.of("generation"), settings.concurrency.of("scraping")) == (generation, scraping)


@pytest.mark.parametrize(
    ("base_url", "dialect", "expected"),
    [
        ("https://openrouter.ai/api/v1/", "auto", "openrouter"),
        ("https://eu.openrouter.ai/api/v1", "auto", "openrouter"),
        ("https://notopenrouter.ai/api/v1", "auto", "compatible"),
        ("http://127.0.0.1:9000/v1", "auto", "compatible"),
        ("http://127.0.0.1:9000/v1", "openrouter", "openrouter"),
        ("http://127.0.0.1:9000/v1", "anthropic", "anthropic"),
        ("https://openrouter.ai/api/v1", "openai", "compatible"),
        ("https://api.openai.com/v1", "openai", "openai"),
    ],
)
def test_dialect_follows_the_address_unless_set(
    base_url: str, dialect: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(monkeypatch, OPENROUTER_BASE_URL=base_url, TOLLBOOK_DIALECT=dialect)
    assert settings.provider_dialect == expected
    assert not settings.openrouter_base_url.endswith("/")


def test_every_setting_is_described() -> None:
    rows = settings_table()
    assert len(rows) == len({name for name, _, _ in rows}) == len(Settings.model_fields)
    for name, _, meaning in rows:
        assert name in {"REDIS_URL", "OPENROUTER_API_KEY", "OPENROUTER_BASE_URL"} or name.startswith("TOLLBOOK_")
        assert meaning
        assert not name.endswith("_S") or "second" in meaning


def test_settings_can_be_made_by_field_name() -> None:
    values: dict[str, Any] = {"_env_file": None, "retries": 0, "namespace": "t1"}
    assert (Settings(**values).retries, Settings(**values).namespace) == (0, "t1")


@pytest.mark.parametrize("claim_after_s", [1.0, 2.0, 30.0, 86_400.0])
def test_a_silent_connection_is_given_up_while_claims_can_still_be_renewed(claim_after_s: float) -> None:
    """With time for three checks: others take a worker for dead at 0.8 of the claim time."""
    timeout_s = answer_timeout_s(Settings(claim_after_s=claim_after_s))
    assert 0.5 <= timeout_s <= 30
    assert timeout_s + 0.3 * claim_after_s <= 0.8 * claim_after_s
