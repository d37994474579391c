"""The machines that play instructions."""
