"""`graph`: a model as a drawing.

`build` makes nested boxes from the traced program, `grid` gives each box a row and a column, `svg` and `html` write the
picture.
"""
