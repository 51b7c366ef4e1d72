"""What happens when parts of a system die, lie or stand still, and how it goes on."""
