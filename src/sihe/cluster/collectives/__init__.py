"""All-reduce as it is done in textbooks, over point-to-point messages, each beside the alpha-beta model of its time.

To look at, not to train with: the library that carries the messages has faster ones of its own.
"""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ALGORITHMS": "sihe.cluster.collectives.catalog",
        "Cost": "sihe.cluster.collectives.costs",
        "Link": "sihe.cluster.collectives.costs",
        "Peers": "sihe.cluster.collectives.peers",
        "fit_link": "sihe.cluster.collectives.fit",
    },
)
