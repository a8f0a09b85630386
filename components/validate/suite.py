"""Evaluation of the checks by Great Expectations, on numeric tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from components.common.errors import KubealignError
from components.validate.checks import Check

LINE_NUMBER = "number"


class Suite:
    """An in-memory Great Expectations context that validates data frames."""

    def __init__(self) -> None:
        import great_expectations as gx

        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        asset = context.data_sources.add_pandas("pandas").add_dataframe_asset("rows")
        self.batches = asset.add_batch_definition_whole_dataframe("all")

    def failing(self, columns: dict[str, Any], checks: list[Check]) -> dict[str, NDArray[np.int64]]:
        """The lines of a table that fail each check.

        Args:
            columns: one numeric array or list per column; NaN fails no check.
            checks: checks whose expectations name these columns.

        Raises:
            KubealignError: an expectation could not be evaluated, which is never the data's fault.
        """
        import great_expectations.expectations as gxe

        read = {value for check in checks for key, value in check.arguments.items() if key.startswith("column")}
        names = sorted(read & columns.keys()) or list(columns)
        line_codes, lines = _distinct([columns[name] for name in names])
        table = pd.DataFrame({name: np.asarray(columns[name])[lines] for name in names})
        table[LINE_NUMBER] = np.arange(len(table), dtype=np.int32)
        batch = self.batches.get_batch({"dataframe": table})
        # By default GE repeats tested values and line numbers in its results; request the line numbers only.
        result_format = {
            "result_format": "COMPLETE",
            "unexpected_index_column_names": [LINE_NUMBER],
            "return_unexpected_index_query": False,
            "partial_unexpected_count": 0,
        }
        failed = {}
        for check in checks:
            result = batch.validate(getattr(gxe, check.expectation)(**check.arguments), result_format=result_format)
            exceptions = _exceptions(result.exception_info)
            if exceptions:
                raise KubealignError(f"check {check.name} could not be evaluated: {exceptions[0]}")
            entries = result.result.get("unexpected_index_list") or []
            if result.success == bool(entries):
                raise KubealignError(
                    f"check {check.name} could not be evaluated: Great Expectations returned no line numbers"
                )
            fails = np.zeros(len(lines), bool)
            fails[[entry[LINE_NUMBER] for entry in entries]] = True
            failed[check.name] = np.flatnonzero(fails[line_codes])
        return failed


def _distinct(columns: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each line the number of the first one equal to it among the distinct ones, and where those are.

    Few lines of a million differ in their flags, and a check looks at each line by itself: a hundredth of the time.
    """
    codes = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, names = pd.factorize(np.asarray(column), use_na_sentinel=False)
        codes = pd.factorize(codes * len(names) + values)[0]
    return codes, np.unique(codes, return_index=True)[1]


def _exceptions(info: Any) -> list[str]:
    entries = [info] if "raised_exception" in info else list(info.values())
    return [str(entry["exception_message"]) for entry in entries if entry.get("raised_exception")]
