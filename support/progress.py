"""Show progress in a terminal and in a notebook, and none in a log file."""

from tqdm.auto import tqdm
from tqdm.notebook import tqdm as _notebook_tqdm

# The value of `disable` for every bar. None lets tqdm ask the stream whether it is a terminal. A notebook's
# stream is none, but shows bars all the same.
HIDDEN: bool | None = False if issubclass(tqdm, _notebook_tqdm) else None
