"""ProWD (Yoon et al., ICML 2022): dequantize rung by rung, mask by relevancy, then aggregate."""

from strategies.prowd.options import ProWDOptions
from strategies.prowd.paper import ProWDPaper, ProWDPaperOptions
from strategies.prowd.strategy import ProWD

__all__ = ["ProWD", "ProWDOptions", "ProWDPaper", "ProWDPaperOptions"]
