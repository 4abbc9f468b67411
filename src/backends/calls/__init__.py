"""What one call asks for: its datums as requests, checked and prepared once, and the cotangents of its loss."""
