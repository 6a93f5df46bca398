"""Images that cannot be read: counted, named, and too many of them end the run."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

ALWAYS_PASSED_OVER = 3  # images an epoch and rank: of a small set, any share worth its name is less than one image


class UnreadableImages(ValueError):
    """One image too many cannot be read; the message names it and says what can be done."""


class CorruptImages:
    """The tally of one rank. `found` maps an unreadable image's name to the reason, `count` counts failed reads."""

    def __init__(self, policy: str, max_fraction: float):
        if policy not in ("skip", "stop"):
            raise ValueError(f"data.corrupt_images={policy} is not known; take skip or stop")
        self.policy = policy
        self.max_fraction = max_fraction
        self.found: dict[str, str] = {}
        self.count = 0
        self._in_epoch: set[str] = set()
        self._epoch_samples = 0

    def start_epoch(self, samples: int) -> None:
        """The budget starts anew; a share of this rank's `samples` of a whole epoch, also after a resume."""
        self._in_epoch = set()
        self._epoch_samples = samples

    def report(self, name: str, reason: str, consequence: str) -> None:
        """Raises UnreadableImages where the policy or the budget says so."""
        name = name.encode(errors="backslashreplace").decode()  # it need not be UTF-8, and every log gets it
        self.count += 1
        if self.policy == "stop":
            raise UnreadableImages(
                f"image {name} cannot be read: {reason}; repair it, or pass over it with data.corrupt_images=skip"
            )
        if name not in self.found:
            logger.warning("image %s cannot be read (%s); %s", name, reason, consequence)
            self.found[name] = reason
        self._in_epoch.add(name)
        unreadable, samples = len(self._in_epoch), self._epoch_samples
        few = ALWAYS_PASSED_OVER if self.max_fraction > 0.0 else 0
        if unreadable > max(few, self.max_fraction * samples) or unreadable >= samples:
            raise UnreadableImages(
                f"{unreadable} of this epoch's {samples} images cannot be read, more than "
                f"data.max_corrupt_fraction={self.max_fraction} and the {few} that are passed over in any case allow; "
                f"the last: {name}: {reason}. Look at the data with scripts/check_data.py, or raise "
                "data.max_corrupt_fraction"
            )
