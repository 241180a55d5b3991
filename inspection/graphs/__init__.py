"""`graph`: a model as a drawing. Boxes are found in the traced program, placed on a grid, written as SVG or HTML."""
