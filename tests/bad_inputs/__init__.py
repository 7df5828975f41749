"""The bad inputs, each with what must happen: for the tests, and for the table in docs/bad-inputs.md."""

from bad_inputs import containers, dicom, geometry, labels, models, values

CASES = [*containers.CASES, *geometry.CASES, *values.CASES, *labels.CASES, *dicom.CASES, *models.CASES]
