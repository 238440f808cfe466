"""What each option may be, and the one form in which anything else is refused."""
