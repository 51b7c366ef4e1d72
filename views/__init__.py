"""What people look at: tables, the live view, the spend report. Reads only."""
