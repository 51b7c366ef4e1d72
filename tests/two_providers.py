"""Two providers beside the default one, as part of a policy file, for tests of several providers."""

from typing import Final

from tollbook.standin import StandIn

TWO_PROVIDERS: Final = """
[providers.openai]
base_url = "{openai}"
key_env = "TEST_OPENAI_KEY"
dialect = "openai"

[providers.claude]
base_url = "{claude}"
key_env = "TEST_CLAUDE_KEY"
dialect = "anthropic"
"""
"""Of a policy file; `format` it with the addresses."""


def addresses_of(*, openai: StandIn, claude: StandIn) -> dict[str, str]:
    """Return the addresses of stand-ins that speak the two dialects; both may be the same stand-in."""
    return {"openai": f"{openai.root_url}/openai/v1", "claude": f"{claude.root_url}/anthropic/v1"}
