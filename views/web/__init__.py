"""The web view at /ui: what the commands show, for people with a key, in a browser. It needs no script and no network.

`site` has the routes and what every request passes, `sessions` who looks, the modules beside it one kind of page each.
Pages are made of `parts`, by templates that escape everything.
"""
