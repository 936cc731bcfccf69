from tests.reconciler.conftest import guard, world

__all__ = ["guard", "world"]
