"""A policy's two providers beside its default one: what tests of several providers begin with."""

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
    """Return the addresses of stand-ins that speak the two dialects; one may be both."""
    return {"openai": f"{openai.root_url}/openai/v1", "claude": f"{claude.root_url}/anthropic/v1"}
