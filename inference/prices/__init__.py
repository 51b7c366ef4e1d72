"""What models cost: configured prices and the catalogue's, as exact integers."""
