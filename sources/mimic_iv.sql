-- MIMIC-IV 2.x and 3.x, folders hosp/ and icu/, to the tables that prepare_data.py works on. Every column comes as text.
-- A visit is a hospital admission. It starts with the registration in the emergency department where that is earlier.

CREATE TABLE visits AS
SELECT hadm_id AS visit_id, subject_id AS client,
       least(wall(admittime), coalesce(wall(edregtime), wall(admittime))) AS visit_start,
       wall(dischtime) AS visit_end, hospital_expire_flag = '1' AS died
FROM admissions;

CREATE TABLE icu_stays AS
SELECT stay_id, hadm_id AS visit_id, subject_id AS client, wall(intime) AS stay_start, wall(outtime) AS stay_end
FROM icustays;

-- charttime: when a sample or a value was taken; storetime: when it could be seen.
CREATE VIEW source_rows AS
SELECT hadm_id AS visit_id, subject_id AS client, moment(charttime) AS charted, moment(storetime) AS available,
       itemid AS code, value, valuenum AS number, valueuom AS unit,
       try_cast(ref_range_lower AS DOUBLE) AS low, try_cast(ref_range_upper AS DOUBLE) AS high
FROM labevents
UNION ALL BY NAME
SELECT c.hadm_id AS visit_id, c.subject_id AS client, moment(c.charttime) AS charted, moment(c.storetime) AS available,
       c.itemid AS code, c.value, c.valuenum AS number, c.valueuom AS unit,
       try_cast(i.lownormalvalue AS DOUBLE) AS low, try_cast(i.highnormalvalue AS DOUBLE) AS high
FROM chartevents c LEFT JOIN d_items i USING (itemid)
UNION ALL BY NAME
SELECT hadm_id AS visit_id, subject_id AS client, moment(charttime) AS charted, moment(storetime) AS available,
       itemid AS code, value, valueuom AS unit
FROM outputevents;

CREATE TABLE code_names AS
SELECT itemid AS code, concat(label, ' (', concat_ws(', ', fluid, category), ')') AS name FROM d_labitems
UNION ALL
SELECT itemid, label FROM d_items;

-- The year of birth follows from the age in the anchor year.
CREATE TABLE patients_known AS
SELECT subject_id AS client, try_cast(anchor_year AS INTEGER) - try_cast(anchor_age AS INTEGER) AS birth_year,
       gender AS sex
FROM patients;

-- Orders; diluents (BASE) are none. Then what was given: eMAR, and infusions in intensive care.
CREATE TABLE antibiotics AS
SELECT p.subject_id AS client, p.hadm_id AS visit_id, s.stay_id, wall(p.starttime) AS start, wall(p.stoptime) AS stop,
       p.drug AS name, p.route, false AS administered, p.pharmacy_id AS order_id
FROM prescriptions p
LEFT JOIN icu_stays s
       ON s.visit_id = p.hadm_id AND wall(p.starttime) >= s.stay_start AND wall(p.starttime) < s.stay_end
WHERE p.drug_type IS DISTINCT FROM 'BASE'
UNION ALL BY NAME
SELECT e.subject_id AS client, e.hadm_id AS visit_id, wall(e.charttime) AS start, e.medication AS name, o.route,
       true AS administered, e.pharmacy_id AS order_id
FROM emar e
LEFT JOIN (SELECT pharmacy_id, any_value(route ORDER BY route) AS route FROM pharmacy GROUP BY pharmacy_id) o
       ON o.pharmacy_id = e.pharmacy_id
WHERE given(e.event_txt)
UNION ALL BY NAME
SELECT i.subject_id AS client, i.hadm_id AS visit_id, i.stay_id, wall(i.starttime) AS start, wall(i.endtime) AS stop,
       d.label AS name, 'IV' AS route, true AS administered, i.orderid AS order_id
FROM inputevents i JOIN d_items d USING (itemid)
WHERE i.ordercategoryname LIKE '%Antibiotics%' AND i.statusdescription IS DISTINCT FROM 'Rewritten';

-- One row a specimen. 90856 means that nothing grew, 90760 that the culture was cancelled.
CREATE TABLE cultures AS
SELECT any_value(subject_id) AS client, max(hadm_id) AS visit_id,
       wall(coalesce(max(charttime), max(chartdate))) AS time, max(charttime) IS NOT NULL AS has_time,
       max(spec_type_desc) AS specimen, bool_or(spec_type_desc LIKE 'BLOOD CULTURE%') AS blood,
       coalesce(bool_or(org_name <> '' AND org_itemid NOT IN ('90856', '90760')), false) AS positive,
       micro_specimen_id AS culture_id
FROM microbiologyevents
GROUP BY micro_specimen_id;

CREATE TABLE vasopressors AS
SELECT subject_id AS client, hadm_id AS visit_id, wall(starttime) AS start, wall(endtime) AS stop, pressor(label) AS drug,
       per_kg(try_cast(rate AS DOUBLE), rateuom, try_cast(patientweight AS DOUBLE)) AS rate
FROM inputevents JOIN d_items USING (itemid)
WHERE pressor(label) IS NOT NULL AND statusdescription IS DISTINCT FROM 'Rewritten';

CREATE TABLE ventilation AS
SELECT subject_id AS client, hadm_id AS visit_id, wall(starttime) AS start, wall(endtime) AS stop
FROM procedureevents
WHERE itemid = '225792';  -- Invasive Ventilation

-- 227488 is what flows in for irrigation of the bladder.
CREATE TABLE urine AS
SELECT subject_id AS client, hadm_id AS visit_id, wall(charttime) AS time,
       try_cast(value AS DOUBLE) * CASE itemid WHEN '227488' THEN -1 ELSE 1 END AS volume
FROM outputevents
WHERE itemid IN ('226559', '226560', '226561', '226584', '226563', '226564', '226565', '226567', '226557', '226558',
                 '227488', '227489');
