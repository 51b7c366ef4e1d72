"""The web view at /ui: what the commands show, in a browser, for people with a key. Pages have no scripts.

`site` has the routes and the checks of every request, `sessions` the sign-in sessions; each `..._pages` module has one
kind of page. Pages consist of `parts`; templates draw them and escape everything.
"""
