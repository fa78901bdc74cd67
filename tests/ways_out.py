"""How a hook can be left, by whoever uses it for a while."""

import pytest


def an_exception(hook, use):
    with pytest.raises(ZeroDivisionError), hook:
        use()
        _ = 1 / 0


def ctrl_c(hook, use):
    with pytest.raises(KeyboardInterrupt), hook:
        use()
        raise KeyboardInterrupt


def by_hand(hook, use):
    use()
    hook.close()


def the_end(hook, use):
    use()
    hook.on_end()


def the_end_of_with(hook, use):
    with hook:
        use()


WAYS_OUT = [an_exception, ctrl_c, by_hand, the_end, the_end_of_with]
