"""What the settings of several commands have in common."""


def check_set(**names: str | None) -> None:
    """Raises ValueError for a setting that is an empty text: None means unset."""
    for name, value in names.items():
        if value == "":
            raise ValueError(f"{name}: expected a name, got an empty one; None means unset")
