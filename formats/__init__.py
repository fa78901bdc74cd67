"""Text that is read: JSON and TOML, field by field as dataclasses declare them."""
