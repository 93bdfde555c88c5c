"""Ground-truth rewards, preference labels, statistics."""
