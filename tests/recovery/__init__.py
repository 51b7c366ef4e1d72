"""What happens when parts of a system die, have wrong data or stand still, and how it recovers."""
