"""No rendezvous of another test's ranks, as for the tests of training."""

from ..train.conftest import no_rendezvous_is_left

__all__ = ["no_rendezvous_is_left"]
