"""Heat maps as pictures, in the colours that W&B's dashboard and the report share."""

import numpy as np

# Blue for no load, white for the balanced load (1), red for 3 and more.
HEAT_STOPS = [0.0, 1.0, 3.0]
HEAT_COLOURS = [[33, 102, 172], [247, 247, 247], [178, 24, 43]]

_CELL_PIXELS = 8  # side of a cell


def heat_map(values: np.ndarray) -> np.ndarray:
    """Return a picture, uint8 [height, width, 3].

    Args:
        values: [rows, columns], drawn as cells: 0 is blue, 1 (the balanced load) white, 3 and more red, NaN
            black. A finished picture, uint8 [height, width, 3], is returned unchanged.

    Raises:
        ValueError: the array has another shape or type.
    """
    if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
        return values
    if values.ndim != 2:
        raise ValueError(
            f"an image is [rows, columns] or uint8 [height, width, 3], "
            f"got {values.dtype} {list(values.shape)}"
        )
    cells = values.astype(np.float64)
    channels = [np.interp(cells, HEAT_STOPS, channel) for channel in zip(*HEAT_COLOURS, strict=True)]
    pixels = np.nan_to_num(np.stack(channels, axis=-1), nan=0.0).round().astype(np.uint8)
    return pixels.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1)
