"""Tensors that cannot be used are refused by an error that says what was given and what was expected."""

import pytest
from conftest import refused


SMALL = (20, 20)


@pytest.fixture(scope="module")
def inputs(chat):
    return chat([("user", (113, 500), SMALL, "which?")])


def test_tensors_that_do_not_belong_together(model, inputs):
    def run(**changes):
        given = {**inputs, **changes}
        return lambda: model(**{name: value for name, value in given.items() if value is not None})

    pixels, places = inputs["pixel_values"], inputs["tile_positions"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    swapped = places.clone()
    swapped[[1, 2]] = swapped[[2, 1]]
    wrong = places.clone()
    wrong[:3, 2] = 2
    cases = {
        "`pixel_values` without `tile_positions`": run(tile_positions=None, input_ids=None, inputs_embeds=embeds),
        r"got \[5, 3, 378, 378\] and \[4, 4\]": run(tile_positions=places[:4]),
        r"got \[4, 3, 378, 378\] and \[5, 4\]": run(pixel_values=pixels[:4]),
        r"\[tiles, 3, 378, 378\], got \[5, 3, 364, 364\]\. .* this model's processor": run(
            pixel_values=pixels[..., :364, :364]
        ),
        r"got \[0, 3, 378, 378\] and \[0, 4\].* where there are no images": run(
            pixel_values=pixels[:0], tile_positions=places[:0]
        ),
        # a sample that `default_collate` put a dimension around
        r"got \[1, 5, 3, 378, 378\] and \[1, 5, 4\].* concatenated along": run(
            pixel_values=pixels[None], tile_positions=places[None]
        ),
        "from tile 3 on .* expected": run(pixel_values=pixels[:4], tile_positions=places[:4]),
        r"from tile 0 on is \[\[0, 0, 1, 2\].* expected \[\[-1, -1, 1, 2\]": run(
            pixel_values=pixels[1:], tile_positions=places[1:]
        ),
        "from tile 0 on is": run(tile_positions=swapped),
        r"from tile 0 on is \[\[-1, -1, 2, 2\]": run(tile_positions=wrong),
        "text has 924 places .* make 392": run(pixel_values=pixels[3:], tile_positions=places[3:]),
        "either `input_ids` or `inputs_embeds`": run(input_ids=None),
    }
    for message, attempt in cases.items():
        with refused(message):
            attempt()
    with refused("without `tile_positions`"):
        model.generate(inputs_embeds=embeds, pixel_values=pixels, max_new_tokens=2)
    with refused("unused|not used"):
        model.generate(**inputs, tile_position=places, max_new_tokens=2)
