"""`prowd publish`: tables and figures of a comparison."""
