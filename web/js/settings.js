// @ts-check
// The pack's part of ComfyUI's settings dialog; its texts in other languages are in locales/*/settings.json.

export const POLL_SECONDS = "GmP.Panel.PollSeconds";
export const SMOOTHING = "GmP.Panel.Smoothing";
export const WHILE_GENERATING = "GmP.Repair.WhileGenerating";

const CATEGORY = "Text Encoder Repair";

export const SETTINGS = [
  {
    id: POLL_SECONDS,
    name: "Seconds between two looks at a run",
    category: [CATEGORY, "Panel", "PollSeconds"],
    tooltip: "How often the panel asks for what a run has recorded, while it is open.",
    type: "slider",
    attrs: { min: 0.5, max: 30, step: 0.5 },
    defaultValue: 1,
    sortOrder: 20,
  },
  {
    id: SMOOTHING,
    name: "Smoothing of the loss",
    category: [CATEGORY, "Panel", "Smoothing"],
    tooltip: "0 shows the loss as it is. At 0.9, about twenty neighbours count; at 0.99, two hundred.",
    type: "slider",
    attrs: { min: 0, max: 0.99, step: 0.01 },
    defaultValue: 0.9,
    sortOrder: 10,
  },
  {
    id: WHILE_GENERATING,
    name: "While pictures are made, a run should",
    category: [CATEGORY, "Runs", "WhileGenerating"],
    tooltip: "What GmP Repair nodes begin with when they are added. Nodes that are there keep what they have.",
    type: "combo",
    options: [
      { value: "pause", text: "Pause" },
      { value: "share", text: "Share the device" },
    ],
    defaultValue: "pause",
    sortOrder: 30,
  },
];
