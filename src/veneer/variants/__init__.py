"""What the update is: one final class ``Variant`` a file."""
