"""How audits are shown: `texts` puts events into words, `screens` prints them, `documents` makes JSON of them."""
