from opd_stream.config_file import load_config as load_config
from opd_stream.errors import UserError as UserError
from opd_stream.store import open_scores as open_scores
from pipeline.api import Run as Run
from pipeline.api import open_run as open_run
from pipeline.api import run as run

__version__: str
__all__ = ["Run", "UserError", "__version__", "load_config", "open_run", "open_scores", "run"]
