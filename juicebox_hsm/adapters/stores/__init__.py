"""What all back ends of the store share, and how one is opened by its URL."""
