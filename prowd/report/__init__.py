"""`prowd report`: one page that shows what runs came to, made from their records."""
