"""The spend report: what it reads, the questions it asks, and how the answers are shown.

`source` finds a running system, a data directory at rest or an archive; `queries` asks a copy of the projection;
`figures`, `charts` and `tables` show the answers; `page` writes a file that stands alone, `app` opens the notebook.
Only `figures`, `charts`, `page` and `app` need the extra `tollbook[report]`. Nothing here can hold up a call or
change a row.
"""
