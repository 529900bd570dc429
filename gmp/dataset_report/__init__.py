"""The report of a data set, before it trains: what is in it, what is wrong with it, and what that means for a repair.

`report.examine` gives the findings, `sheet.contact_sheet` a picture of them, `page.write_page` a page, and `clean` a
list of what to do and an index without what should not be trained on. Nothing is imported here: what the findings are
called takes neither numpy nor torch.
"""
