"""The page at the root: what the gateway is, and a first request. It loads nothing else and has no script."""

from html import escape
from typing import Final

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #fff; --soft: #f2f4f6; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #16181b; --soft: #22262b; --link: #8ab4f8; } }
body { font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }
main { max-width: 44rem; margin: 0 auto; padding: 2.5rem 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
pre { background: var(--soft); padding: 1rem; border-radius: .4rem; overflow-x: auto; font-size: .9rem; }
code { font-family: ui-monospace, monospace; }
a { color: var(--link); }
"""


def welcome_page(url: str) -> str:
    """Return the page of a gateway at this address."""
    address = escape(url)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tollbook gateway</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Tollbook gateway</h1>
<p>It accepts the requests of OpenAI's and Anthropic's clients. It checks each call against its budgets first, and
records its cost on the ledger. In a client, change only the base URL and the key.</p>
<p>Create a key:</p>
<pre><code>tollbook keys create --user u42</code></pre>
<p>Make a call:</p>
<pre><code>curl {address}/v1/chat/completions \\
  -H "Authorization: Bearer tb-..." \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "openai/gpt-4o-mini", "messages": [{{"role": "user", "content": "Hello"}}]}}'</code></pre>
<p>See what is left: <code>curl {address}/v1/key -H "Authorization: Bearer tb-..."</code></p>
<ul>
<li><a href="/openapi.json">The endpoints</a>, as an OpenAPI document</li>
<li><a href="/ui">Spend, budgets, keys and calls</a>, for people with a key</li>
</ul>
</main>
</body>
</html>
"""
