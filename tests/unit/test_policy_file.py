"""The policy file: what it says becomes the policy, and each mistake is one line with file and line."""

import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from tollbook.inference.errors import SettingsError, UnknownStream
from tollbook.inference.policy_file import policy_schema, policy_template, read_policy_file
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.routing import policy_warnings
from tollbook.inference.settings import Settings, load_settings
from tollbook.inference.stated_policy import chosen_streams, concurrency_of, policy_of, policy_sources
from tollbook.schemas.money import NANOUSD_PER_USD
from tollbook.schemas.policy import check_stream, check_task, default_policy
from tollbook.schemas.routes import ModelAt, Target
from tollbook.schemas.tasks import InvalidTask, Task

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
SUMMARIZE = '[tasks.summarize]\nmodel = "a/b"\nmax_tokens = 3\n'
NOVEMBER_2026_MS = 1_795_000_000_000


def problems(tmp_path: Path, text: str | bytes) -> tuple[str, ...]:
    """Return what is wrong with a file, without its folder."""
    path = tmp_path / "tollbook.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as refused:
        read_policy_file(path)
    lines = tuple(line.replace(f"{tmp_path}/", "") for line in refused.value.problems)
    assert all(line.isprintable() for line in lines)
    return lines


def stated(tmp_path: Path, text: str, **settings: Any) -> Settings:
    """Return settings with a policy file."""
    path = tmp_path / "tollbook.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(env_file=None, policy_file=path, **settings)


def test_without_a_file_the_policy_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(env_file=None)
    assert policy_of(settings) == default_policy()
    assert policy_sources(settings) == ()


def test_a_file_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tollbook.toml").write_text("[plans.gold]\ncap_usd = 7\n", encoding="utf-8")
    settings = load_settings(env_file=None)
    assert policy_of(settings).plan_cap_nanousd("gold") == 7 * NANOUSD_PER_USD
    assert policy_sources(settings) == ("tollbook.toml",)


def test_tables_add_to_the_defaults_or_replace_an_entry(tmp_path: Path) -> None:
    policy = policy_of(
        stated(tmp_path, f"{SUMMARIZE}[plans.trial]\ncap_usd = 0.1\n[streams.emails]\nconcurrency = 2\n")
    )
    default = default_policy()
    assert set(policy.tasks) == {*default.tasks, "summarize"}
    assert set(policy.streams) == {*default.streams, "emails"}
    assert policy.plan_caps_nanousd == {**default.plan_caps_nanousd, "trial": NANOUSD_PER_USD // 10}
    route = policy.tasks["summarize"]
    assert (route.model, route.fallback, route.cheaper, route.temperature, route.params) == ("a/b", (), None, None, {})


def test_every_field_is_read(tmp_path: Path) -> None:
    text = (
        'timezone = "Europe/Berlin"\nmonth_starts_on = 15\nweek_starts_on = "sunday"\ndefault_plan = "growth"\n'
        "[users]\nu42 = 100.5\n"
        '[tasks.a]\nmodel = "gpt-4o-mini"\nfallback = ["gemini-flash", "x/y"]\ncheaper = "x/z"\nmax_tokens = 5\n'
        'temperature = 0.25\nparams = { response_format = { type = "json_object" }, top_p = 0.5 }\n'
        '[[budgets]]\nname = "team"\nby = ["team", "task"]\nwindow = "week"\ncap_usd = 20\ncaps = { "red,a" = 40 }\n'
        "alerts = [0.5, 1.0]\n"
        '[prices."my/model"]\nprompt = 0.1\ncompletion = "0.2"\n'
        '[[prices."x/y"]]\nprompt = 1\ncompletion = 2\n'
        '[[prices."x/y"]]\nprompt = 2\ncompletion = 4\nfrom = 2026-12-01\n'
        '[alerts]\nwebhook_env = "HOOK"\n'
    )
    policy = policy_of(stated(tmp_path, text))
    route = policy.tasks["a"]
    assert (route.model, route.fallback) == ("openai/gpt-4o-mini", ("google/gemini-2.5-flash", "x/y"))
    assert route.params == {"response_format": {"type": "json_object"}, "top_p": 0.5}
    assert policy.user_caps_nanousd == {"u42": 100_500_000_000}
    assert policy.budgets[0].cap_nanousd("red,a") == 40 * NANOUSD_PER_USD
    assert policy.budgets[0].alerts == (Decimal("0.5"), Decimal(1))
    assert [rule.starts for rule in policy.prices["x/y"]] == [None, "2026-12-01"]
    prices = PriceCatalogue.of_policy(policy, provider="openrouter")
    assert prices.price("my/model", NOVEMBER_2026_MS).max_prices(0) == (NANOUSD_PER_USD // 10, NANOUSD_PER_USD // 5)
    assert "alerts" not in policy.content()


def test_the_content_of_a_policy_is_read_as_the_same_policy() -> None:
    """It stands on the ledger as JSON."""
    for path in EXAMPLES.glob("*/tollbook.toml"):
        policy = read_policy_file(path).policy
        again = type(policy).model_validate(policy.content())
        assert again.digest == policy.digest


PROVIDER = '[providers.x]\nbase_url = "https://x"\n'
OPENAI = 'dialect = "openai"\n'
BUDGET = '[[budgets]]\nname = "x"\nwindow = "day"\ncap_usd = 1\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a = 1\n\n[plans.x]\ncap_usd = 1\ncap_usd = 2\n",
            "tollbook.toml:5: this key or table is defined twice in the file",
        ),
        ("[plans.x]\ncap_usd = 1\n# x\n[plans.x]\n", "tollbook.toml:4: this table is defined twice in the file"),
        ('[tasks.a]\nmodel = "a\n', "tollbook.toml:2: illegal character"),
        ("[tasks.a]\nmodel =\n", "tollbook.toml:2: invalid value"),
        ("timezone = 1e999999999999\nx = 2026-13-45\n", "tollbook.toml"),
        (b"\n\xff\n", "tollbook.toml:2: is not UTF-8"),
        ("\n[task.a]\n", "tollbook.toml:2: unknown field 'task'; did you mean 'tasks'?"),
        (SUMMARIZE + 'fallbak = "x"\n', "tollbook.toml:4: unknown field 'fallbak' in 'tasks.summarize'; did you mean"),
        (SUMMARIZE + "zzz = 1\n", "unknown field 'zzz' in 'tasks.summarize'; known fields: model, fallback, cheaper"),
        ("[plans.x]\ncap_usd = -5\n", "tollbook.toml:2: 'plans.x.cap_usd' must be dollars from 0 to 1000000, not -5"),
        ("[plans.x]\ncap_usd = true\n", "tollbook.toml:2: 'plans.x.cap_usd' must be a number, not true"),
        ("[plans.x]\ncap_usd = nan\n", "tollbook.toml:2: 'plans.x.cap_usd' must be dollars from 0 to 1000000"),
        ("plans = 3\n", "tollbook.toml:1: 'plans' must be a table, not 3"),
        ('[tasks.a]\n\nmodel = "a/b"\n', "tollbook.toml:1: 'tasks.a.max_tokens' is missing"),
        (
            '[tasks.a]\nmodel = "a/b"\nfallback = [\n  "c/d",\n  "two words",\n]\nmax_tokens = 3\n',
            "tollbook.toml:3: 'tasks.a.fallback[1]' must be a model id",
        ),
        (
            SUMMARIZE + 'fallback = ["c/d", "a/b"]\n',
            "tollbook.toml:1: 'tasks.summarize' the fallback is the model itself",
        ),
        (SUMMARIZE + 'fallback = ["c/d", "c/d"]\n', "the fallback c/d is named twice"),
        (SUMMARIZE + 'cheaper = "a/b"\n', "the cheaper model is the model itself, a/b"),
        (SUMMARIZE + "params = { n = 3 }\n", "tollbook.toml:4: 'tasks.summarize.params' has an unknown parameter 'n'"),
        (SUMMARIZE + "params = { stop = 2026-12-01 }\n", "'tasks.summarize.params' must contain only JSON values"),
        ('[tasks.ping]\nmodel = "a/b"\nmax_tokens = 3\n', "'tasks' 'ping' calls no model and has no route"),
        (
            "[streams.Emails]\n",
            "tollbook.toml:1: the name 'Emails' in 'streams' must be a name of 1 to 50 small letters",
        ),
        (
            "streams.x.concurrency = 0\n",
            "tollbook.toml:1: 'streams.x.concurrency' must be a whole number from 1 to 10000",
        ),
        ('default_plan = "tril"\n', "tollbook.toml:1: 'default_plan': unknown plan 'tril'; did you mean 'trial'?"),
        (
            2 * '[[budgets]]\nname = "x"\nwindow = "day"\ncap_usd = 1\n',
            "tollbook.toml:6: 'budgets[1].name': there is another budget named 'x'",
        ),
        (
            '[[budgets]]\nname = "x"\nwindow = "wek"\ncap_usd = 1\n',
            "tollbook.toml:3: 'budgets[0].window' must be one of 'day', 'week', 'month', 'total', not 'wek'; did you",
        ),
        (
            '[[budgets]]\nname = "x"\nwindow = "day"\ncap_usd = 1\n[budgets.caps]\nred = -1\n',
            "tollbook.toml:6: 'budgets[0].caps.red' must be dollars from 0 to 1000000, not -1",
        ),
        (
            '[[budgets]]\nname = "x"\nby = ["team", "user"]\nwindow = "day"\ncap_usd = 1\ncaps = { red = 1 }\n',
            "tollbook.toml:6: 'budgets[0].caps' has 'red', which must have 2 values separated by commas",
        ),
        (
            '[[budgets]]\nname = "x"\nby = ["a", "b"]\nwindow = "day"\ncap_usd = 1\n'
            'caps = { "5%,c" = 1, "5%25,c" = 2 }\n',
            "tollbook.toml:6: 'budgets[0].caps' has '5%25,c' twice, in two spellings",
        ),
        ('[prices."m/n"]\nprompt = 1\n', "tollbook.toml:1: 'prices.m/n[0].completion' is missing"),
        ('prices."m/n" = []\n', "tollbook.toml:1: 'prices.m/n' must have one price or more"),
        (
            '[prices."m/n"]\nprompt = 1\ncompletion = 1\nfrom = "soon"\n',
            "tollbook.toml:4: 'prices.m/n[0].from' must be a day in UTC such as '2026-12-01', not 'soon'",
        ),
        ('[users]\n"e\u0301" = 1\n"\u00e9" = 2\n', "tollbook.toml:1: 'users' names user '\u00e9' twice"),
        ('[providers.x]\nbase_url = "ftp://x"\n', "tollbook.toml:2: 'providers.x.base_url' must be an address such as"),
        (
            PROVIDER + 'dialekt = "openai"\n',
            "tollbook.toml:3: unknown field 'dialekt' in 'providers.x'; did you mean 'dialect'",
        ),
        (
            PROVIDER + 'dialect = "opanai"\n',
            "tollbook.toml:3: 'providers.x.dialect' must be one of 'openrouter', 'openai', 'ant",
        ),
        (PROVIDER, "tollbook.toml:1: 'providers.x.dialect' is missing"),
        (
            PROVIDER.replace("x]", "default]") + 'dialect = "openai"\n',
            "tollbook.toml:1: 'providers.default' is the provider that OPENROUTER_BASE_URL and OPENROUTER_API_KEY desc",
        ),
        (
            PROVIDER + 'dialect = "anthropic"\ncost_by_id = true\n',
            "tollbook.toml:1: 'providers.x' must not have cost_by_id = true: providers of dialect 'anthropic' report",
        ),
        (
            PROVIDER + 'dialect = "openai"\nstream = true\n',
            "tollbook.toml:1: 'providers.x' must not have stream = true: providers of dialect 'openai' report no cost",
        ),
        (
            PROVIDER + 'dialect = "compatible"\nprices_from = "catalogue"\n',
            "tollbook.toml:1: 'providers.x' has prices_from = 'catalogue': set 'catalogue' to its name there",
        ),
        (
            PROVIDER + 'dialect = "compatible"\nprices_from = "modles"\n',
            "tollbook.toml:4: 'providers.x.prices_from' must be one of 'models', 'catalogue', 'policy', not 'modles'",
        ),
        (
            PROVIDER + 'dialect = "compatible"\n[providers.x.prices."m"]\nprompt = 1\n',
            "tollbook.toml:4: 'providers.x.prices.m[0].completion' is missing",
        ),
        (
            '[tasks.a]\nmodel = "m"\nprovider = "opnai"\nmax_tokens = 3\n' + PROVIDER.replace("x]", "openai]") + OPENAI,
            "tollbook.toml:3: 'tasks.a.provider': unknown provider 'opnai'; did you mean 'openai'?",
        ),
        (
            '[tasks.a]\nmodel = "m"\nfallback = ["n", { provider = "y", model = "n" }]\nmax_tokens = 3\n',
            "tollbook.toml:3: 'tasks.a.fallback[1].provider': unknown provider 'y'; known: default",
        ),
        (
            '[tasks.a]\nmodel = "m"\ncheaper = { provider = "y", model = "n" }\nmax_tokens = 3\n',
            "tollbook.toml:3: 'tasks.a.cheaper.provider': unknown provider 'y'",
        ),
        (
            '[tasks.a]\nmodel = "m"\nfallback = { provider = "y", modl = "n" }\nmax_tokens = 3\n',
            "unknown field 'modl' in 'tasks.a.fallback[0]'; did you mean 'model'?",
        ),
        (
            '[tasks.a]\nmodel = "m"\nfallback = { provider = "default", model = "m" }\nmax_tokens = 3\n',
            "tollbook.toml:1: 'tasks.a' the fallback is the model itself, m",
        ),
        ('[alerts]\nwebhook_env = "a b"\n', "tollbook.toml:2: 'alerts.webhook_env' must be the name of an environment"),
        ("[alerts]\nprojector_behind_s = true\n", "tollbook.toml:2: 'alerts.projector_behind_s' must be a number, not"),
        ("month_starts_on = true\n", "tollbook.toml:1: 'month_starts_on' must be a number, not true"),
        ("\n[plans.x]\ncap_usd = 1e9999999999999999999999\n", "tollbook.toml:3: number of too many digits"),
        (f"\nmonth_starts_on = {'1' * 5000}\n", "tollbook.toml:2: number of too many digits"),
        ("[plans.x]\ncap_usd = 1e-999999999\n", "tollbook.toml:2: 'plans.x.cap_usd' must have at most 100 decimal pl"),
        ("\na = " + "[" * 20_000, "tollbook.toml:2: nested too deep"),
        ("\n\na" + ".a" * 3_000 + " = 1\n", "tollbook.toml:3: is nested more than 100 deep"),
        ("\n[a" + ".a" * 3_000 + "]\n", "tollbook.toml:2: is nested more than 100 deep"),
        # Characters that end a line to Python, and not in TOML.
        ('# a\u2028b\u0085\n\ntimezon = "UTC"\n', "tollbook.toml:3: unknown field 'timezon'; did you mean 'timezone'?"),
        ('x = "a\u2028b"\nx = 1\n', "tollbook.toml:2: this key or table is defined twice in the file"),
        ('timezone = """UTC\n# ["""\n[plans.x]\ncap_usd = -1\n', "tollbook.toml:4: 'plans.x.cap_usd' must be dollars"),
        ('timezone = "Europe/Berln"\n', "; did you mean 'Europe/Berlin'?"),
        (f'timezone = "{"a" * 5000}"\n', "'timezone' a text of 5000 characters is not a known time zone"),
        (
            '\ntimezone = "localtime"\n',
            "tollbook.toml:2: 'timezone' must be a zone such as 'Europe/Berlin', not 'localt",
        ),
        ("[prices.m]\nprompt = 1\nzzz = 1\n", "web_search, request, from"),
        (
            BUDGET + 'by = ["user_id"]\n',
            "tollbook.toml:5: 'budgets[0].by' has 'user_id', a field of tasks that is no tag; did",
        ),
        (
            BUDGET + 'by = ["prompt"]\n',
            "tollbook.toml:5: 'budgets[0].by' has 'prompt', a field of tasks that",
        ),
        (BUDGET + 'by = ["team", "team"]\n', "tollbook.toml:5: 'budgets[0].by' has team twice"),
        (BUDGET + "alerts = [0.5, 0.50]\n", "tollbook.toml:5: 'budgets[0].alerts' has 0.50 twice"),
        ("[plans.x]\ncap_usd = 1\nalerts = [1, 1.0]\n", "tollbook.toml:3: 'plans.x.alerts' has 1.0 twice"),
        (
            BUDGET + 'by = ["plan"]\n[budgets.caps]\ntrail = 2\n',
            "tollbook.toml:7: 'budgets[0].caps' has an unknown plan 'trail'; did you mean 'trial'?",
        ),
        (
            BUDGET + 'by = ["team", "task"]\n[budgets.caps]\n"red,score" = 2\n',
            "tollbook.toml:7: 'budgets[0].caps' has an unknown task type 'score'",
        ),
        (
            '[providers.x]\ndialect = "openai"\nbase_url = "https://[::1/v1"\n',
            "tollbook.toml:3: 'providers.x.base_url' is not a valid address",
        ),
        (
            '[providers.x]\ndialect = "openai"\nbase_url = "https://a:99999/v1"\n',
            "tollbook.toml:3: 'providers.x.base_url' must have a port from 1 to 65535, or none",
        ),
    ],
)
def test_a_mistake_is_one_line_with_file_and_line(tmp_path: Path, text: str | bytes, problem: str) -> None:
    lines = problems(tmp_path, text)
    assert len([line for line in lines if problem in line]) == 1, lines


@pytest.mark.parametrize(
    "text",
    [
        "budgets = [\n" + 400 * '  { name = "x", window = "day", cap_usd = 1 },\n' + "]\n",
        "[users]\n" + "".join(f"u{number} = 1\n" for number in range(1_000)) + "u1 = 2\n",
    ],
    ids=["a list of many lines", "a key of many that stands twice"],
)
def test_the_time_for_a_file_does_not_grow_with_its_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    read: list[int] = []
    loads = tomllib.loads

    def counted(part: str, **options: Any) -> dict[str, Any]:
        read.append(len(part))
        return loads(part, **options)

    monkeypatch.setattr(tomllib, "loads", counted)
    problems(tmp_path, text)
    assert sum(read) < 20 * len(text)


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(SettingsError, match="must have at most 2000000 bytes"):
        read_policy_file(Path("/dev/zero"))


def test_a_policy_of_a_ledger_is_read_although_a_file_may_no_longer_say_it() -> None:
    budget = {"name": "x", "by": ["user_id"], "window": "day", "cap_usd": "1", "alerts": ["0.5", "0.5"]}
    content = default_policy().content() | {"timezone": "Factory", "budgets": [budget]}
    assert type(default_policy()).model_validate(content).budgets[0].by == ("user_id",)


def test_prices_stand_in_the_order_of_their_days_however_these_are_written() -> None:
    days = ["20261203", "2026-12-02", "2026-W49-2", None]
    rules = [{"prompt": 1, "completion": 1} | ({} if day is None else {"from": day}) for day in days]
    assert [rule.starts for rule in default_policy({"prices": {"m": rules}}).prices["m"]] == days[::-1]
    same = [{"prompt": number, "completion": 1, "from": day} for number, day in enumerate(["20261201", "2026-12-01"])]
    with pytest.raises(ValidationError, match="each with a different 'from' day"):
        default_policy({"prices": {"m": same}})


def test_all_mistakes_are_reported_in_the_order_of_their_lines(tmp_path: Path) -> None:
    lines = problems(tmp_path, "[streams.x]\nconcurrency = 0\n[plans.x]\n[tasks.a]\nmodel = 3\nmax_tokens = 0\n")
    assert [re.match(r"tollbook.toml:(\d+)", line)[1] for line in lines] == ["2", "3", "5", "6"]  # pyright: ignore[reportOptionalSubscript]


SECRET = "sk-live-0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f'[providers.openai]\nbase_url = "https://api.openai.com/v1"\napi_key = "{SECRET}"\n',
        f'[providers.openai]\nbase_url = "https://api.openai.com/v1"\nkey_env = "{SECRET}"\n',
        f'[providers.openai]\nbase_url = "https://u:{SECRET}@api.openai.com/v1"\n',
        f'[providers.openai]\nbase_url = "https://x"\nheaders = {{ Authorization = "Bearer {SECRET}" }}\n',
        f'[alerts]\n\nwebhook_env = "https://hooks.slack.com/services/{SECRET}"\n',
        f'\n\nopenrouter-api-key = "{SECRET}"\n',
        f'[[budgets]]\n\npassword = "{SECRET}"\n',
    ],
)
def test_a_secret_is_refused_with_its_line_and_never_shown(tmp_path: Path, text: str) -> None:
    """G10: what a policy says goes onto the ledger."""
    (line,) = problems(tmp_path, text)
    assert re.match(r"tollbook.toml:[1-4]: '.*' looks like a secret, which a policy must not hold: ", line)
    assert '_env = "' in line or 'key_env = "' in line
    assert SECRET not in line


def test_a_harmless_value_with_the_name_of_a_secret_is_accepted(tmp_path: Path) -> None:
    policy = policy_of(stated(tmp_path, f"{SUMMARIZE}[plans.token]\ncap_usd = 1\n[users]\nsecret = 5\n"))
    assert "token" in policy.plans


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^TOLLBOOK_POLICY: there is no file '.*/no\.toml'$"):
        load_settings(env_file=None, policy_file=tmp_path / "no.toml")


def test_the_template_is_the_default_policy(tmp_path: Path) -> None:
    assert policy_of(stated(tmp_path, policy_template())) == default_policy()
    said = tomllib.loads(policy_template())
    assert (set(said["plans"]), set(said["tasks"]), set(said["streams"])) == (
        set(default_policy().plans), set(default_policy().tasks), set(default_policy().streams),
    )  # fmt: skip


def test_the_examples_in_the_template_load_without_their_comment_signs(tmp_path: Path) -> None:
    text = re.sub(r"(?m)^#(?=\S)", "", policy_template())
    policy = policy_of(stated(tmp_path, text))
    assert {"enterprise", "summarize", "emails", "team-week", "my/model", "u42"} <= {
        *policy.plans, *policy.tasks, *policy.streams, *(rule.name for rule in policy.budgets), *policy.prices,
        *policy.users,
    }  # fmt: skip


def documents() -> list[Any]:
    texts = {
        "template": policy_template(),
        "template with examples": re.sub(r"(?m)^#(?=\S)", "", policy_template()),
        **{path.parent.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*/tollbook.toml")},
    }
    assert len(texts) > 2
    return [pytest.param(text, id=name) for name, text in texts.items()]


@pytest.mark.parametrize("text", documents())
def test_examples_are_as_the_schema_for_editors_says(text: str, tmp_path: Path) -> None:
    validator = Draft202012Validator(policy_schema())
    assert list(validator.iter_errors(tomllib.loads(text))) == []
    policy_of(stated(tmp_path, text))


@pytest.mark.parametrize(
    "wrong",
    [
        {"plan": {}}, {"plans": {"x": {}}}, {"plans": {"x": {"cap_usd": -1}}}, {"tasks": {"a": {"model": "a/b"}}},
        {"tasks": {"a": {"model": "a/b", "max_tokens": 1, "fallbak": "x"}}}, {"budgets": [{"name": "x"}]},
        {"streams": {"Emails": {}}}, {"month_starts_on": 29}, {"streams": {"x": {"concurrency": 0}}},
        {"gateway": {"max_tokens": 0}}, {"models": {"m": {"image_tokens": 0}}}, {"alerts": {"projector_behind_s": 0}},
    ],
)  # fmt: skip
def test_mistakes_are_against_the_schema(wrong: Mapping[str, Any]) -> None:
    assert not Draft202012Validator(policy_schema()).is_valid(wrong)


CONFLICTS: list[tuple[str, dict[str, str], str]] = [
    (
        "[plans.trial]\ncap_usd = 5\n", {"caps": '{"plans": {"trial": 7}}'},
        "TOLLBOOK_CAPS and {} differ about the cap of plan 'trial'",
    ),
    ("[users]\nu1 = 5\n", {"caps": '{"users": {"u1": 7}}'}, "TOLLBOOK_CAPS and {} differ about the cap of user 'u1'"),
    (
        SUMMARIZE, {"routes": '{"summarize": {"model": "c/d"}}'},
        "TOLLBOOK_ROUTES and {} differ about 'model' of 'summarize'",
    ),
    (
        '[prices."m"]\nprompt = 1\ncompletion = 1\n', {"prices": '{"m": {"prompt": 1, "completion": 2}}'},
        "TOLLBOOK_PRICES and {} differ about the price of 'm'",
    ),
    (
        '[[budgets]]\nname = "day"\nby = ["user"]\nwindow = "day"\ncap_usd = 2\n', {"day_cap_nanousd": "1"},
        "TOLLBOOK_DAY_CAP_USD and {} differ about the budget 'day'",
    ),
    (
        "[streams.emails]\nconcurrency = 4\n", {"concurrency": '{"emails": 5}'},
        "TOLLBOOK_CONCURRENCY and {} differ about the concurrency of stream 'emails'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "settings", "problem"), CONFLICTS)
def test_a_file_and_a_setting_that_differ_are_both_named(
    tmp_path: Path, text: str, settings: dict[str, str], problem: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        stated(tmp_path, text, **settings)
    assert refused.value.problems == (problem.format(tmp_path / "tollbook.toml") + ": give it in one of them",)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("[plans.trial]\ncap_usd = 5\n", {"caps": '{"plans": {"trial": 5}}'}),
        ("[plans.gold]\ncap_usd = 5\n", {"caps": '{"plans": {"trial": 7}}'}),
        (SUMMARIZE, {"routes": '{"summarize": {"model": "a/b", "temperature": 0.5}}'}),
        ("[streams.emails]\nconcurrency = 4\n", {"concurrency": '{"emails": 4, "analysis": 2}'}),
    ],
)
def test_a_setting_that_says_the_same_or_something_else_goes_with_the_file(
    tmp_path: Path, text: str, settings: dict[str, str]
) -> None:
    policy_of(stated(tmp_path, text, **settings))


def test_settings_are_shorthand_for_parts_of_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(
        env_file=None, caps='{"users": {"u1": 7}, "plans": {"trial": 6}}', day_cap_nanousd="1",
        campaign_cap_nanousd="3", prices='{"m": {"prompt": 1, "completion": 2, "from": "2026-12-01"}}',
        routes='{"score_post": {"fallback": ["a/b", "c/d"], "cheaper": "e/f"}}',
    )  # fmt: skip
    said = policy_of(settings)
    file = (
        "[users]\nu1 = 7\n[plans.trial]\ncap_usd = 6\n"
        '[[budgets]]\nname = "day"\nby = ["user"]\nwindow = "day"\ncap_usd = 1\n'
        '[[budgets]]\nname = "campaign"\nby = ["campaign"]\nwindow = "month"\ncap_usd = 3\n'
        '[prices.m]\nprompt = 1\ncompletion = 2\nfrom = "2026-12-01"\n'
        '[tasks.score_post]\nmodel = "claude-3-haiku"\nfallback = ["a/b", "c/d"]\ncheaper = "e/f"\nmax_tokens = 500\n'
        "temperature = 0.0\n"
    )
    assert policy_sources(settings) == (
        "TOLLBOOK_CAPS", "TOLLBOOK_ROUTES", "TOLLBOOK_PRICES", "TOLLBOOK_DAY_CAP_USD", "TOLLBOOK_CAMPAIGN_CAP_USD",
    )  # fmt: skip
    assert policy_sources(load_settings(env_file=None, concurrency="3")) == ()
    assert policy_of(stated(tmp_path, file)).digest == said.digest


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"caps": '{"plans": {"trail": 6}}'}, "TOLLBOOK_CAPS: unknown plan 'trail'; did you mean 'trial'?"),
        ({"routes": '{"sumarize": {"max_tokens": 6}}'}, "TOLLBOOK_ROUTES: unknown task type 'sumarize'; did you mean"),
        ({"routes": '{"summarize": {"max_tokens": 0}}'}, "TOLLBOOK_ROUTES: 'summarize.max_tokens' must be a whole"),
    ],
)
def test_a_setting_names_what_the_file_has(tmp_path: Path, settings: dict[str, str], problem: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(problem)):
        stated(tmp_path, SUMMARIZE, **settings)


def test_concurrency_is_the_settings_then_the_policys_then_the_settings_default(tmp_path: Path) -> None:
    settings = stated(tmp_path, "[streams.emails]\nconcurrency = 4\n[streams.x]\n", concurrency='{"analysis": 2}')
    found = concurrency_of(settings, policy_of(settings))
    assert (found["emails"], found["analysis"], found["x"]) == (4, 2, 32)


def test_streams_of_a_worker_are_the_named_ones_or_all(tmp_path: Path) -> None:
    policy = policy_of(stated(tmp_path, "[streams.emails]\n"))
    assert chosen_streams((), policy) == tuple(policy.streams)
    assert chosen_streams(("emails",), policy) == ("emails",)
    with pytest.raises(UnknownStream, match=r"unknown stream 'email'; did you mean 'emails'\?"):
        chosen_streams(("email",), policy)


def test_a_task_is_checked_against_the_policy_with_its_names(tmp_path: Path) -> None:
    policy = policy_of(stated(tmp_path, f"{SUMMARIZE}[plans.gold]\ncap_usd = 1\n[streams.emails]\n"))
    values = {"task": "summarize", "user_id": "u1", "prompt": "x", "plan": "gold"}
    assert check_task(Task.model_validate(values), policy).plan == "gold"
    for change, problem in (
        (
            {"task": "sumarize"},
            "'task' must be one of .*'summarize', 'ping', not 'sumarize'; did you mean 'summarize'?",
        ),
        (
            {"plan": "Gold"},
            "'plan' must be one of 'trial', 'starter', 'growth', 'gold', not 'Gold'; did you mean 'gold'?",
        ),
        ({"reply_to": "emails"}, "'reply_to' must not be a stream or a key of a Tollbook, as 'emails' is"),
    ):
        with pytest.raises(InvalidTask, match=problem):
            check_task(Task.model_validate({**values, **change}), policy)
        # What this policy has, the default may not have.
    with pytest.raises(InvalidTask, match="'task' must be one of"):
        check_task(Task.model_validate(values), default_policy())
    with pytest.raises(InvalidTask, match=r"unknown stream 'email'; did you mean 'emails'\?"):
        check_stream("email", policy)


def test_models_whose_calls_would_be_refused_are_named_when_a_policy_is_applied(tmp_path: Path) -> None:
    text = (
        '[tasks.a]\nmodel = "no/price"\nmax_tokens = 3\n'
        '[tasks.b]\nmodel = "openai/gpt-4o-mini"\ncheaper = "anthropic/claude-sonnet-4"\nmax_tokens = 3\n'
        '[providers.x]\nbase_url = "https://x"\ndialect = "compatible"\n'
        '[tasks.c]\nprovider = "x"\nmodel = "own"\nmax_tokens = 3\n'
    )
    policy = policy_of(stated(tmp_path, text))
    prices = PriceCatalogue.of_policy(policy, provider="openrouter")
    assert policy_warnings(policy, prices, NOVEMBER_2026_MS) == [
        "a: no price is known for its model no/price: its calls would be refused",
        "c: no price is known for its model own at x: its calls would be refused",
        "b: its cheaper model anthropic/claude-sonnet-4 is not cheaper than openai/gpt-4o-mini",
    ]
    assert policy_warnings(default_policy(), prices, NOVEMBER_2026_MS) == []


words = st.sampled_from(
    [
        "[plans.x]", "[[budgets]]", "a = 1", 'name = "x"', "cap_usd = 1", "[tasks.a.params]", '"""', "[", "x", "# y",
        "by = [", "]", "[a]b", "=", '"q.r" = {z = 1}', "",
    ]
)  # fmt: skip


@given(st.lists(words, max_size=8))
def test_any_text_is_a_policy_or_refused_in_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    mistakes: tuple[str, ...] = ()
    try:
        read_policy_file(path)
    except SettingsError as exc:
        mistakes = exc.problems
    for problem in mistakes:
        number = re.match(re.escape(str(path)) + r":(\d+): ", problem)
        assert number is not None, problem
        assert 1 <= int(number[1]) <= max(1, len(lines))


def test_a_plain_model_id_is_one_of_the_routes_provider(tmp_path: Path) -> None:
    text = f"""{PROVIDER}{OPENAI}
[tasks.there]
provider = "x"
model = "gpt-4o-mini"
fallback = ["own", {{ provider = "default", model = "gpt-4o-mini" }}]
cheaper = "small"
max_tokens = 3
[tasks.here]
model = "gpt-4o-mini"
fallback = {{ provider = "x", model = "gpt-4o-mini" }}
max_tokens = 3
"""
    policy = policy_of(stated(tmp_path, text))
    there, here = policy.tasks["there"], policy.tasks["here"]
    mini = Target("openai/gpt-4o-mini")  # A short name is one of the default provider's.
    assert there.targets == (Target("gpt-4o-mini", "x"), Target("own", "x"), mini, Target("small", "x"))
    assert here.targets == (mini, Target("gpt-4o-mini", "x"))
    assert there.after(Target("own", "x")) == (mini,)
    assert there.downgraded().targets == (Target("small", "x"), Target("own", "x"), mini)
    assert policy.called_providers == ("default", "x")
    assert there.from_fallback(mini).targets == (mini, Target("small", "x"))
    assert there.from_fallback(mini).cheaper_target == Target("small", "x")
    with_other = there.model_copy(update={"cheaper": ModelAt(provider="default", model="cheap")}).downgraded()
    assert with_other.targets == (Target("cheap"), Target("own", "x"), mini)


def test_a_policy_without_providers_is_on_the_ledger_as_before() -> None:
    """Its digest must not change with what later versions can say."""
    assert "provider" not in str(default_policy().content()["tasks"])
