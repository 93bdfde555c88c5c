"""What every stage works with: the session, its rows, reference, precision and samples."""
