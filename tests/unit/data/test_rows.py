"""The rows' types say what the files hold: columns, order, types, and what may be missing."""

from __future__ import annotations

import pyarrow as pa
import pytest

from diffexpo.data.rows import SCHEMAS, Pair, Sample, schema_of
from tests.rows import sample_row

TEXT, COUNT, NUMBER = pa.string(), pa.int64(), pa.float64()


def written(*columns: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=nullable) for name, kind, nullable in columns])


SAMPLES = written(
    ("sample_id", TEXT, False),
    ("iteration", COUNT, False),
    ("unit", COUNT, False),
    ("group", COUNT, True),
    ("prompt_id", TEXT, False),
    ("prompt", TEXT, False),
    ("negative_prompt", TEXT, True),
    ("agent", TEXT, False),
    ("weights", TEXT, True),
    ("seed_key", TEXT, True),
    ("batch_size", COUNT, True),
    ("batch_position", COUNT, True),
    ("sampler", TEXT, True),
    ("rewards", pa.map_(TEXT, NUMBER), True),
    ("latent_file", TEXT, False),
    ("model", TEXT, True),
    ("source", TEXT, False),
    ("improved_from", TEXT, True),
    ("height", COUNT, True),
    ("width", COUNT, True),
)
PAIRS = written(
    ("pair_id", TEXT, False),
    ("iteration", COUNT, False),
    ("prompt_id", TEXT, False),
    ("prompt", TEXT, False),
    ("winner_id", TEXT, False),
    ("loser_id", TEXT, False),
    ("judge", TEXT, False),
    ("margin", NUMBER, True),
    ("source", TEXT, False),
    ("winner_agent", TEXT, True),
    ("loser_agent", TEXT, True),
    ("explored_id", TEXT, True),
    ("main_id", TEXT, True),
    ("uncertainty_winner", NUMBER, True),
    ("uncertainty_loser", NUMBER, True),
    ("votes", COUNT, True),
    ("agreement", NUMBER, True),
)


@pytest.mark.parametrize(("kind", "name", "schema"), [(Sample, "samples", SAMPLES), (Pair, "pairs", PAIRS)])
def test_the_schema_that_follows_from_the_fields_is_that_of_the_files(
    kind: type, name: str, schema: pa.Schema
) -> None:
    assert schema_of(kind).equals(schema, check_metadata=True) and SCHEMAS[name] == schema
    assert schema_of(kind).serialize().equals(schema.serialize())


def test_json_columns_are_parsed_and_empty_where_nothing_was_drawn() -> None:
    drawn = sample_row("s", seed_key='[7, 1, "collect"]', sampler='{"name": "ddim", "steps": 4}')
    assert drawn.noise_key == [7, 1, "collect"] and drawn.sampler_settings == {"name": "ddim", "steps": 4}
    imported = sample_row("s")
    assert imported.noise_key == [] and imported.sampler_settings == {}


def test_an_unknown_column_is_an_error_where_the_row_is_made() -> None:
    with pytest.raises(TypeError, match="promt"):
        sample_row("s", promt="x")
