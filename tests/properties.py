"""How many examples a property test draws: a fifth by default, all of them in a run that takes the slow tests too."""

from hypothesis import settings


def examples(number: int) -> settings:
    """Draw `number` examples in the profile "full" (see conftest.py), a fifth of them otherwise."""
    return settings(max_examples=number if settings.get_current_profile_name() == "full" else number // 5)
