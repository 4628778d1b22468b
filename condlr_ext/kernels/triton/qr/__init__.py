"""QR of many matrices of any shapes at once."""
