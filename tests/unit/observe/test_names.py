from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes

from baton.observe import names


def texts(prefix: str) -> dict[str, str]:
    return {key: value for key, value in vars(names).items() if key.startswith(prefix) and isinstance(value, str)}


def test_genai_attributes_are_those_of_the_conventions() -> None:
    known = {value for key, value in vars(gen_ai_attributes).items() if key.startswith("GEN_AI_")}
    ours = set(texts("GEN_AI_").values())
    assert ours <= known
    assert names.ERROR_TYPE == error_attributes.ERROR_TYPE


def test_operations_are_those_of_the_conventions() -> None:
    known = {operation.value for operation in gen_ai_attributes.GenAiOperationNameValues}
    assert set(texts("OPERATION_").values()) <= known


def test_no_name_is_used_twice() -> None:
    every = [value for key, value in vars(names).items() if key.isupper() and key not in ("PROVIDER",)]
    assert len(every) == len(set(every))
