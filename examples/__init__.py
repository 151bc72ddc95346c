"""Complete programs that use the library."""
