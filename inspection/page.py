"""The font of the HTML pages and SVG pictures that this room writes."""

FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
