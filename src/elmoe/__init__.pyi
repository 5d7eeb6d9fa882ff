from elmoe.engine.options import EngineOptions as EngineOptions
from elmoe.errors import ElmoeError as ElmoeError
from elmoe.generation import Generation as Generation
from elmoe.generation import Piece as Piece
from elmoe.generation import SamplingParams as SamplingParams
from elmoe.llm import Model as Model
from elmoe.llm import load as load

__version__: str
__all__: list[str]
