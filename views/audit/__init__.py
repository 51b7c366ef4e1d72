"""Shows audits: `texts` describes events, `screens` prints them, `documents` returns them as JSON."""
