"""Where W lives: one final class ``Base`` a file."""
