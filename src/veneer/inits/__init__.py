"""How an adapter starts: one final class ``Init`` a file."""
