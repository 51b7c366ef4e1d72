"""The spend report: what it reads, the questions it asks, and how the answers are drawn.

`source` finds a running system, a data directory at rest or an archive; `queries` asks a copy of the projection;
`charts` and `tables` draw; `page` writes a file that stands alone, `app` opens the notebook. Only `charts`, `page` and
`app` need the extra `tollbook[report]`. Reads only: nothing here can hold up a call or change a row.
"""
