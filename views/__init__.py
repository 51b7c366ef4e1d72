"""What people look at: tables, the live view, the spend report, the web view. Never decides about calls."""
